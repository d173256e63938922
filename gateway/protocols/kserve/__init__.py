"""The inference protocol of KServe and Triton."""
