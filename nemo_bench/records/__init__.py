"""What is stored: plain data, the files of a results folder, statistics over them."""
