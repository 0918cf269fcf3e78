"""Pictures and clips that strangers send: what they are by their content, decoded in a process with limits."""
