"""What a call asks for: frozen dataclasses, the flags that set them, and the errors that refuse them. No torch."""
