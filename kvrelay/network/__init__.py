"""gRPC, HTTP and addresses."""
