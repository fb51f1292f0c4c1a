"""Five course assignments with graders: docs/teaching.md is the teacher's page, each folder's README the student's."""
