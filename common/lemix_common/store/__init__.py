"""The cluster's state in Redis: one file a subject, each Lua call beside the method that makes it."""
