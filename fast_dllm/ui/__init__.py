"""The chat and the web page: state and pictures of one conversation."""
