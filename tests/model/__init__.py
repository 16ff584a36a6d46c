"""The merge protocol as a model, in every order in which its steps can come."""
