"""The inference protocol of KServe and Triton, as a gateway serves it: the same requests in other messages."""
