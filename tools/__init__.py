"""What is run on a checkout, on the source of the kernels: no part of the installed package."""
