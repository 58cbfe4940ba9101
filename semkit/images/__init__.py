"""Images: the unit and the box, one picture, sets of them, loading, augmentation."""
