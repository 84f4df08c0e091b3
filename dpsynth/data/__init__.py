"""What we hold: patients, their images, one reader and writer for each format."""
