"""Images: read or generated as uint8 arrays, split, held on the device, and cut into augmented batches there."""
