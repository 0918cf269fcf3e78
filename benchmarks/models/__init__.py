"""What is measured: full-size and small models, diffusers as the reference, formulas."""
