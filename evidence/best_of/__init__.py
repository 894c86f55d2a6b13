"""Does the worst case of several reward models hold where one is gamed? See PROTOCOL.md."""
