"""Readers of files: each returns named columns, whatever the file, and leaves the meaning of their cells to others.

tables                       which reader a path needs, and limits of size
csv_file, parquet_file       tables
image_folder, images         images as files
image_arrays                 images as an array of an .npz or .parquet
"""
