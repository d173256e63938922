"""The live page and its prompt box, over HTTP."""
