"""The server: front end, engine process, and what starts and supervises them."""
