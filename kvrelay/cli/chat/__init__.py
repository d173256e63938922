"""The `kvrelay chat` command."""
