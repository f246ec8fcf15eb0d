"""What is done to a layer before any method: one file per transform, one file in conf/transform/."""
