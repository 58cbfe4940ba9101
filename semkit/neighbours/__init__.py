"""The lines of work beside stable error-minimizing noise, as modules on the same floors."""
