"""Reading what others wrote, with a bound on everything before anything is done: files, JSON, pickles, names in messages."""
