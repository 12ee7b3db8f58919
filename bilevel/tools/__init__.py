"""Tools for people: models as pytrees, diagnosis, differences, memory."""
