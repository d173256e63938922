"""kvrelay measured against what people would use instead, in one run."""
