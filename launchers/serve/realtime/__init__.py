"""The WebSocket protocol: the messages, the controller's connection, and the viewers'."""
