"""What tools/book.py does to the sources when it stages them, and to the pages when they are built. Nothing here is kept in a source."""
