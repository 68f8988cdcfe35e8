"""The interfaces that programs speak, a module each: what was asked, and how it is answered, in their words."""
