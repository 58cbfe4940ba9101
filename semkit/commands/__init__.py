"""What the command line does: its words, its commands, and the folders of protected images that they make and read."""
