"""A session's media: MP4 fragments made from the run's segments without encoding again, and the HLS playlist."""
