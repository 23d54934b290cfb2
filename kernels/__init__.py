"""The operators in Triton: one function for each schema in flatops/schemas.py."""
