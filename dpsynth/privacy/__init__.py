"""Everything the privacy claim rests on, without torch: audit this folder and you have audited the claim."""
