"""What the book's build is made of, beside tools/book.py."""
