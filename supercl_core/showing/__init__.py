"""What a cache holds, for people: tables, pictures, pages, and an audit of its pairs."""
