"""Bringing in what is already there: tars by anyone, folders of pictures, images in Parquet."""
