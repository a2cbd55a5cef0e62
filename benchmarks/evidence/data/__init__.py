"""Images, lists, numbers, and what is made wrong in them."""
