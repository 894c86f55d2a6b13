"""Do labels that say how sure they are pay, where they are single votes? See PROTOCOL.md."""
