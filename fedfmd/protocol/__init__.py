"""What travels between the server and its clients: messages, named arrays, compression, averaging."""
