"""Generated from protos/kvrelay/kserve by tools/generate_protos.py (`make protos`). Do not edit; the tests compare it with the protos."""
