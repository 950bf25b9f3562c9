"""Tables and pictures over operating points and run folders."""
