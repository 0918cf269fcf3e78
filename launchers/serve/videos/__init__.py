"""OpenAI's Videos API: videos that are made in the background, polled and downloaded."""
