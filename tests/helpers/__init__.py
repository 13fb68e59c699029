"""What several tests share, by subject. No name here stands for two things."""
