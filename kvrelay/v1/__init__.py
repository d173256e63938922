"""Generated from protos/kvrelay/v1 by tools/generate_protos.py (`make protos`). Do not edit; the tests compare it with the protos."""
