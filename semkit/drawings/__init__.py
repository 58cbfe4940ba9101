"""What the figures are drawn of, axes and rows in, marks on the axes out; and how a figure is shown and saved."""
