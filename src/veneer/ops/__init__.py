"""What has a kernel behind it: a plain torch reference is the specification, faster ones stand beside it."""
