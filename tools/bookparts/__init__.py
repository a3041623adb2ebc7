"""What tools/book.py adds to the sources when it stages them: maps, boxes, indexes and the API reference. Nothing here is kept in a source."""
