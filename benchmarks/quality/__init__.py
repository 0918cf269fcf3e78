"""Quality that is measured on pictures, with the embedded models, whose world a small classifier knows."""
