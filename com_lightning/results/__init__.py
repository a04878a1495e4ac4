"""What a merge leaves behind: report, checkpoints, tables, pages, pictures, and the journal of an unfinished one."""
