"""What the command line does with its options: folders of protected images, their reports and their checks."""
