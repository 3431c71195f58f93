"""The site's audit log: what was submitted and denied, and what left the site."""
