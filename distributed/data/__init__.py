"""Images: read or generated as uint8 arrays, split, stored on device or host, and batched and augmented on the device."""
