"""From COCO files on disk to batches of images and targets."""
