"""What has a kernel behind it: the plain torch reference is the specification, faster implementations stand beside it."""
