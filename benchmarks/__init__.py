"""What the bundle does, measured beside the raw loops on the same machine in the same run."""
