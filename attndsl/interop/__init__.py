"""What is written for other libraries, read and written."""
