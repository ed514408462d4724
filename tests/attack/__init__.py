"""Attacks on any store that keeps files and an index in a directory; nothing here knows of cachedb."""
